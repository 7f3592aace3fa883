/*
 * What a guest does to a disk, in two ways. A static program for Linux.
 *
 *   blockload verify DEVICE SECONDS WORKERS      writes records with checksums, flushes, reads them back
 *   blockload check DEVICE WORKERS               reads what `verify` left, and tells the newest record of each worker
 *   blockload discard DEVICE                     gives all of it back
 *   blockload bench DEVICE seq|rand read|write DEPTH SECONDS   O_DIRECT by Linux's own asynchronous I/O
 *
 * Each worker of `verify` has an equal part of the disk, divided into records of 4096 bytes. Record n goes to place
 * n modulo the places. After each batch it flushes, and then says "FLUSHED worker n": from then on record n may
 * never be lost again. Lines: "BLOCK OK ...", "BLOCK FAIL ...", "BENCH {json}".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RECORD 4096
#define BATCH 16
#define MAGIC 0x52454556424c4b31ull
#define MAX_DEPTH 64
#define SEQUENTIAL_BYTES (128 << 10)

struct record {
    uint64_t magic, worker, number, place, sum;
    uint8_t data[RECORD - 40];
};

static char *buffer;
static uint64_t disk_bytes;

static void say(const char *format, ...) {
    char line[256];
    va_list list;
    va_start(list, format);
    int count = vsnprintf(line, sizeof line, format, list);
    va_end(list);
    if (write(1, line, count) != count)
        _exit(3);
}

static void fail(const char *what) {
    say("BLOCK FAIL %s: %s\n", what, strerror(errno));
    _exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static uint64_t mix(uint64_t x) {
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

static uint64_t checksum(const struct record *r) {
    const uint64_t *words = (const uint64_t *)r;
    uint64_t sum = 0x9e3779b97f4a7c15ull;
    for (unsigned i = 0; i < RECORD / 8; i++)
        if (i != 4)
            sum = (sum ^ words[i]) * 0x100000001b3ull + i;
    return sum;
}

static void fill(struct record *r, uint64_t worker, uint64_t number, uint64_t place) {
    uint64_t *words = (uint64_t *)r->data, seed = mix(worker << 48 ^ number);
    for (unsigned i = 0; i < sizeof r->data / 8; i++)
        words[i] = seed += 0x9e3779b97f4a7c15ull;
    r->magic = MAGIC;
    r->worker = worker;
    r->number = number;
    r->place = place;
    r->sum = checksum(r);
}

static int good(const struct record *r, uint64_t worker, uint64_t place) {
    return r->magic == MAGIC && r->worker == worker && r->place == place && r->sum == checksum(r);
}

static int open_disk(const char *path, int flags) {
    int fd = open(path, flags | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        fail(path);
    /* What a test checks on its host may be a file. */
    if (ioctl(fd, BLKGETSIZE64, &disk_bytes) < 0)
        disk_bytes = lseek(fd, 0, SEEK_END);
    if (posix_memalign((void **)&buffer, 4096, (size_t)MAX_DEPTH * SEQUENTIAL_BYTES))
        fail("memory");
    return fd;
}

/* Read a record back and compare: number must be what was written there last. */
static void read_back(int fd, uint64_t base, uint64_t worker, uint64_t place, uint64_t number) {
    struct record *r = (struct record *)(buffer + BATCH * RECORD);
    if (pread(fd, r, RECORD, base + place * RECORD) != RECORD)
        fail("read");
    if (!good(r, worker, place) || r->number != number) {
        say("BLOCK FAIL worker %d place %d: expected %d, found %d sum %s\n", (int)worker, (int)place, (int)number,
            (int)r->number, r->sum == checksum(r) ? "right" : "wrong");
        _exit(1);
    }
}

static int worker(const char *path, uint64_t id, uint64_t workers, double seconds) {
    int fd = open_disk(path, O_RDWR);
    uint64_t places = disk_bytes / workers / RECORD, base = id * places * RECORD, number = 0, random = id + 1;
    double start = now(), longest = 0, last_said = 0;
    places -= places % BATCH;
    while (now() - start < seconds) {
        double before = now();
        for (unsigned i = 0; i < BATCH; i++)
            fill((struct record *)(buffer + i * RECORD), id, number + i, (number + i) % places);
        /* Records are pages of one request or of several, in turn. */
        size_t piece = (number / BATCH) % 2 ? RECORD : BATCH * RECORD;
        for (size_t at = 0; at < BATCH * RECORD; at += piece)
            if (pwrite(fd, buffer + at, piece, base + number % places * RECORD + at) != (ssize_t)piece)
                fail("write");
        number += BATCH;
        if (fdatasync(fd) < 0)
            fail("fdatasync");
        if (now() - last_said > 0.1) {
            say("FLUSHED %d %lld\n", (int)id, (long long)number - 1);
            last_said = now();
        }
        random = mix(random + number);
        uint64_t back = random % (number < places ? number : places);
        read_back(fd, base, id, (number - 1 - back) % places, number - 1 - back);
        if (now() - before > longest)
            longest = now() - before;
    }
    uint64_t from = number > places ? number - places : 0;
    for (uint64_t n = from; n < number; n++)
        read_back(fd, base, id, n % places, n);
    say("WORKER %d wrote %lld records, longest turn %d ms\n", (int)id, (long long)number, (int)(longest * 1000));
    return 0;
}

static int verify(const char *path, double seconds, int workers) {
    int status, bad = 0;
    for (int i = 0; i < workers; i++)
        if (fork() == 0)
            _exit(worker(path, i, workers, seconds));
    while (wait(&status) > 0)
        bad |= status;
    say(bad ? "BLOCK FAIL a worker failed\n" : "BLOCK OK verified\n");
    return bad != 0;
}

static int check(const char *path, int workers) {
    int fd = open_disk(path, O_RDONLY);
    for (int id = 0; id < workers; id++) {
        uint64_t places = disk_bytes / workers / RECORD, base = id * places * RECORD, bad = 0, newest = 0;
        places -= places % BATCH;
        for (uint64_t place = 0; place < places; place++) {
            struct record *r = (struct record *)buffer;
            if (pread(fd, r, RECORD, base + place * RECORD) != RECORD)
                fail("read");
            if (r->magic == MAGIC && !good(r, id, place))
                bad++;
            else if (r->magic == MAGIC && r->number > newest)
                newest = r->number;
        }
        say("FOUND %d newest %lld bad %lld\n", id, (long long)newest, (long long)bad);
    }
    say("BLOCK OK checked\n");
    return 0;
}

static int discard(const char *path) {
    int fd = open_disk(path, O_RDWR);
    uint64_t range[2] = {0, disk_bytes};
    if (ioctl(fd, BLKDISCARD, range) < 0)
        fail("BLKDISCARD");
    say("BLOCK OK discarded\n");
    return 0;
}

/* -- measuring */

static long io_setup(unsigned count, aio_context_t *context) { return syscall(SYS_io_setup, count, context); }
static long io_submit(aio_context_t context, long count, struct iocb **list) {
    return syscall(SYS_io_submit, context, count, list);
}
static long io_getevents(aio_context_t context, long least, long most, struct io_event *events) {
    return syscall(SYS_io_getevents, context, least, most, events, NULL);
}

static int bench(const char *path, int sequential, int writing, int depth, double seconds) {
    int fd = open_disk(path, writing ? O_RDWR : O_RDONLY);
    size_t size = sequential ? SEQUENTIAL_BYTES : RECORD;
    uint64_t places = disk_bytes / size, next = 0, random = 1, done = 0;
    aio_context_t context = 0;
    struct iocb blocks[MAX_DEPTH], *list[MAX_DEPTH];
    struct io_event events[MAX_DEPTH];
    if (depth < 1 || depth > MAX_DEPTH || io_setup(MAX_DEPTH, &context) < 0)
        fail("io_setup");
    memset(buffer, 0x5a, (size_t)MAX_DEPTH * SEQUENTIAL_BYTES);
    memset(blocks, 0, sizeof blocks);
    long free_count = depth, flying = 0;
    int slots[MAX_DEPTH];
    for (int i = 0; i < depth; i++)
        slots[i] = i;
    double start = now();
    while (flying || now() - start < seconds) {
        long ready = 0;
        while (free_count && now() - start < seconds) {
            int slot = slots[--free_count];
            uint64_t place = sequential ? next++ % places : (random = mix(random + 1)) % places;
            struct iocb *one = &blocks[slot];
            one->aio_lio_opcode = writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
            one->aio_fildes = fd;
            one->aio_buf = (uintptr_t)(buffer + (size_t)slot * SEQUENTIAL_BYTES);
            one->aio_nbytes = size;
            one->aio_offset = place * size;
            one->aio_data = slot;
            list[ready++] = one;
        }
        for (long sent = 0; sent < ready;) {
            long count = io_submit(context, ready - sent, list + sent);
            if (count <= 0)
                fail("io_submit");
            sent += count;
        }
        flying += ready;
        if (!flying)
            break;
        long count = io_getevents(context, 1, MAX_DEPTH, events);
        if (count < 0)
            fail("io_getevents");
        for (long i = 0; i < count; i++) {
            if ((size_t)events[i].res != size)
                fail("short transfer");
            slots[free_count++] = events[i].data;
        }
        flying -= count;
        done += count;
    }
    if (writing && fdatasync(fd) < 0)
        fail("fdatasync");
    double took = now() - start;
    say("BENCH {\"operations\": %lld, \"bytes\": %lld, \"seconds\": %d.%06d}\n", (long long)done,
        (long long)(done * size), (int)took, (int)((took - (int)took) * 1e6));
    return 0;
}

int main(int count, char **words) {
    if (count == 5 && !strcmp(words[1], "verify"))
        return verify(words[2], atof(words[3]), atoi(words[4]));
    if (count == 3 && !strcmp(words[1], "discard"))
        return discard(words[2]);
    if (count == 4 && !strcmp(words[1], "check"))
        return check(words[2], atoi(words[3]));
    if (count == 7 && !strcmp(words[1], "bench"))
        return bench(words[2], !strcmp(words[3], "seq"), !strcmp(words[4], "write"), atoi(words[5]), atof(words[6]));
    say("BLOCK FAIL usage\n");
    return 2;
}
