/* sha256 and gzip round trips by busybox, against this file's own sha256 (FIPS 180-4). */
#include "stress.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST = 40000 };

static uint32_t rotate(uint32_t value, int bits)
{
    return value >> bits | value << (32 - bits);
}

static const uint32_t constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static void digest_block(uint32_t state[8], const unsigned char *block)
{
    uint32_t words[64], v[8];
    for (int at = 0; at < 16; at++)
        words[at] = (uint32_t)block[4 * at] << 24 | (uint32_t)block[4 * at + 1] << 16 |
                    (uint32_t)block[4 * at + 2] << 8 | block[4 * at + 3];
    for (int at = 16; at < 64; at++)
        words[at] = words[at - 16] + words[at - 7] +
                    (rotate(words[at - 15], 7) ^ rotate(words[at - 15], 18) ^ words[at - 15] >> 3) +
                    (rotate(words[at - 2], 17) ^ rotate(words[at - 2], 19) ^ words[at - 2] >> 10);
    memcpy(v, state, sizeof(v));
    for (int at = 0; at < 64; at++) {
        uint32_t one = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25)) +
                       ((v[4] & v[5]) ^ (~v[4] & v[6])) + constants[at] + words[at];
        uint32_t two = (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22)) +
                       ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof(v[0]));
        v[4] += one;
        v[0] = one + two;
    }
    for (int at = 0; at < 8; at++)
        state[at] += v[at];
}

static void digest(const unsigned char *data, size_t size, char text[65])
{
    uint32_t state[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                          0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
    unsigned char last[128] = { 0 };
    size_t whole = size / 64 * 64, rest = size - whole, end = rest < 56 ? 64 : 128;
    for (size_t at = 0; at < whole; at += 64)
        digest_block(state, data + at);
    memcpy(last, data + whole, rest);
    last[rest] = 0x80;
    for (size_t byte = 0; byte < 8; byte++)
        last[end - 1 - byte] = (unsigned char)((uint64_t)size * 8 >> 8 * byte);
    for (size_t at = 0; at < end; at += 64)
        digest_block(state, last + at);
    for (int at = 0; at < 8; at++)
        sprintf(text + 8 * at, "%08x", state[at]);
}

static int opened(const char *path, int flags)
{
    int file = open(path, flags | O_CLOEXEC, 0600);
    if (file < 0)
        fail("archive: %s: %m", path);
    return file;
}

static void must_say(const char *path, const char *sum, const char *what)
{
    char found[64];
    int file = opened(path, O_RDONLY);
    if (read(file, found, 64) != 64 || memcmp(found, sum, 64))
        fail("archive: sha256 %s is not %.8s...", what, sum);
    close(file);
}

void run_archive(int worker, unsigned int seed)
{
    static unsigned char data[MOST];
    char plain[64], packed[64], result[64], sum[65];
    int through[2];
    size_t size = 1000 + seed % (MOST - 1000);
    uint32_t state = seed;
    for (size_t at = 0; at < size; at++) {
        if (at % 97 < 60) /* some noise, some text that packs */
            state = state * 1664525 + 1013904223;
        data[at] = (unsigned char)(state >> 24);
    }
    snprintf(plain, sizeof(plain), "/tmp/stress-%d", worker);
    snprintf(packed, sizeof(packed), "/tmp/stress-%d.gz", worker);
    snprintf(result, sizeof(result), "/tmp/stress-%d.sum", worker);
    digest(data, size, sum);
    int file = opened(plain, O_RDWR | O_CREAT | O_TRUNC);
    if (write(file, data, size) != (ssize_t)size)
        fail("archive: write: %m");
    close(file);
    int output = opened(result, O_RDWR | O_CREAT | O_TRUNC);
    finished(spawn((const char *const[]){ "/bin/busybox", "sha256sum", plain, NULL }, -1, output), 0, "sha256sum");
    must_say(result, sum, "of a file");
    int archive = opened(packed, O_RDWR | O_CREAT | O_TRUNC);
    finished(spawn((const char *const[]){ "/bin/busybox", "gzip", "-c", plain, NULL }, -1, archive), 0, "gzip");
    if (pipe2(through, O_CLOEXEC) || lseek(archive, 0, SEEK_SET) || lseek(output, 0, SEEK_SET) || ftruncate(output, 0))
        fail("archive: %m");
    pid_t unpacker = spawn((const char *const[]){ "/bin/busybox", "gunzip", "-c", NULL }, archive, through[1]);
    pid_t summer = spawn((const char *const[]){ "/bin/busybox", "sha256sum", NULL }, through[0], output);
    close(through[0]);
    close(through[1]);
    finished(unpacker, 0, "gunzip");
    finished(summer, 0, "sha256sum of a pipe");
    must_say(result, sum, "after gzip and gunzip");
    close(archive);
    close(output);
    unlink(plain), unlink(packed), unlink(result);
}
