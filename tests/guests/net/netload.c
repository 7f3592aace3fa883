/* Traffic between two ends, in a guest or on the host, and what became of it.
 *
 *   netload sink PORT                   take one connection, check its bytes, answer with how many they were
 *   netload source HOST PORT SECONDS    send checked bytes for so long:     "SOURCE bytes=N seconds=S"
 *   netload fetch HOST PORT SECONDS     receive checked bytes for so long:  "FETCH bytes=N seconds=S"
 *   netload give PORT                   the other end of fetch
 *   netload echo PORT                   give back what comes, byte by byte
 *   netload rtt HOST PORT COUNT         so many bytes there and back:       "RTT count=N us=MEAN min=.. max=.."
 *
 * The bytes are a sequence of 64-bit numbers, so that what is lost, doubled or changed is found at once. */

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define WORDS 16384

static uint64_t words[WORDS];

static void die(const char *what)
{
    printf("NETLOAD-FAILED %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec + ts.tv_nsec / 1e9;
}

static uint64_t word(uint64_t number)
{
    return number * 0x9E3779B97F4A7C15ull;
}

static int taken(const char *port)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0), got;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 1))
        die("listen");
    printf("LISTENING %s\n", port);
    fflush(stdout);
    got = accept(fd, NULL, NULL);
    if (got < 0)
        die("accept");
    close(fd);
    setsockopt(got, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return got;
}

static int reached(const char *host, const char *port)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (inet_pton(AF_INET, host, &at.sin_addr) != 1 || connect(fd, (struct sockaddr *)&at, sizeof at))
        die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

/* Send the sequence until the time is over or, at 0, the other end closes. */
static uint64_t pour(int fd, double seconds)
{
    double end = now() + seconds;
    uint64_t bytes = 0, next = 0;
    while (seconds == 0 || now() < end) {
        for (int i = 0; i < WORDS; i++)
            words[i] = word(next++);
        for (size_t done = 0; done < sizeof words;) {
            ssize_t count = send(fd, (char *)words + done, sizeof words - done, MSG_NOSIGNAL);
            if (count <= 0) {
                if (seconds == 0)
                    return bytes;
                die("send");
            }
            done += count;
            bytes += count;
        }
    }
    return bytes;
}

/* Receive and check it until its end, or for so long if that is not 0. */
static uint64_t drain(int fd, double seconds)
{
    double end = now() + seconds;
    uint64_t bytes = 0, next = 0;
    size_t have = 0;
    while (seconds == 0 || now() < end) {
        ssize_t count = recv(fd, (char *)words + have, sizeof words - have, 0);
        if (count < 0)
            die("recv");
        if (count == 0)
            break;
        bytes += count;
        have += count;
        size_t whole = have / 8;
        for (size_t i = 0; i < whole; i++)
            if (words[i] != word(next++)) {
                printf("NETLOAD-CORRUPT at word %llu\n", (unsigned long long)next - 1);
                exit(2);
            }
        have -= whole * 8;
        memmove(words, words + whole, have);
    }
    return bytes;
}

static void sink(const char *port)
{
    int fd = taken(port);
    uint64_t bytes = drain(fd, 0);
    if (send(fd, &bytes, sizeof bytes, MSG_NOSIGNAL) != sizeof bytes)
        die("answer");
    printf("SINK bytes=%llu\n", (unsigned long long)bytes);
}

static void source(const char *host, const char *port, double seconds)
{
    int fd = reached(host, port);
    double start = now();
    uint64_t bytes = pour(fd, seconds), seen = 0;
    shutdown(fd, SHUT_WR);
    if (recv(fd, &seen, sizeof seen, MSG_WAITALL) != sizeof seen)
        die("answer");
    double took = now() - start;
    if (seen != bytes) {
        printf("NETLOAD-CORRUPT %llu of %llu bytes\n", (unsigned long long)seen, (unsigned long long)bytes);
        exit(2);
    }
    printf("SOURCE bytes=%llu seconds=%.6f\n", (unsigned long long)bytes, took);
}

static void rtt(const char *host, const char *port, int count)
{
    int fd = reached(host, port);
    double least = 1e9, most = 0, sum = 0;
    for (int i = 0; i < count; i++) {
        char byte = i, back;
        double start = now();
        if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1 || recv(fd, &back, 1, 0) != 1 || back != byte)
            die("echo");
        double took = now() - start;
        sum += took;
        least = took < least ? took : least;
        most = took > most ? took : most;
    }
    printf("RTT count=%d us=%.1f min=%.1f max=%.1f\n", count, sum / count * 1e6, least * 1e6, most * 1e6);
}

static void echo(const char *port)
{
    int fd = taken(port);
    char data[4096];
    ssize_t count;
    while ((count = recv(fd, data, sizeof data, 0)) > 0)
        if (send(fd, data, count, MSG_NOSIGNAL) != count)
            die("echo");
    printf("ECHO done\n");
}

int main(int argc, char **argv)
{
    const char *mode = argc > 2 ? argv[1] : "";
    if (!strcmp(mode, "sink"))
        sink(argv[2]);
    else if (!strcmp(mode, "echo"))
        echo(argv[2]);
    else if (!strcmp(mode, "give"))
        printf("GIVE bytes=%llu\n", (unsigned long long)pour(taken(argv[2]), 0));
    else if (!strcmp(mode, "source") && argc == 5)
        source(argv[2], argv[3], atof(argv[4]));
    else if (!strcmp(mode, "fetch") && argc == 5) {
        int fd = reached(argv[2], argv[3]);
        double start = now();
        uint64_t bytes = drain(fd, atof(argv[4]));
        printf("FETCH bytes=%llu seconds=%.6f\n", (unsigned long long)bytes, now() - start);
    } else if (!strcmp(mode, "rtt") && argc == 5)
        rtt(argv[2], argv[3], atoi(argv[4]));
    else {
        printf("NETLOAD-FAILED usage\n");
        return 1;
    }
    return 0;
}
