/*
 * A guest's part of bench/migration.py: sends a small packet every so often and writes memory at a steady rate.
 *
 *     movebench ADDRESS PORT PERIOD_US MIB_PER_SECOND WORKING_SET_MIB
 *
 * Each packet has a number and the guest's own clock (CLOCK_MONOTONIC, ns) when it was sent, 16 bytes in all, little
 * endian. What is written is checked: each page holds what was put there last, or the program ends with an error.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define PAGE 4096

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_until(uint64_t when)
{
    struct timespec t = {when / 1000000000, when % 1000000000};

    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "MOVEBENCH-USAGE\n");
        return 2;
    }
    uint64_t period = strtoull(argv[3], NULL, 10) * 1000;
    uint64_t pages = strtoull(argv[5], NULL, 10) * (1 << 20) / PAGE;
    /* Pages for each period, in 1/1024. */
    uint64_t share = strtoull(argv[4], NULL, 10) * (1 << 20) / PAGE * period / 976563;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    int sock = socket(AF_INET, SOCK_DGRAM, 0);
    uint64_t *memory = pages ? aligned_alloc(PAGE, pages * PAGE) : NULL;
    uint64_t packet[2] = {0, 0}, due = 0, at = 0, round = 0;

    if (sock < 0 || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1 || (pages && !memory)) {
        fprintf(stderr, "MOVEBENCH-FAILED %s\n", strerror(errno));
        return 1;
    }
    if (pages)
        memset(memory, 0, pages * PAGE);
    printf("MOVEBENCH-STARTED\n");
    fflush(stdout);
    for (uint64_t next = now() + period;; next += period) {
        sleep_until(next);
        packet[0]++;
        packet[1] = now();
        if (packet[1] > next + period) /* it stood still: what was missed is not made up for */
            next = packet[1];
        sendto(sock, packet, sizeof(packet), 0, (struct sockaddr *)&to, sizeof(to));
        for (due += share; pages && due >= 1024; due -= 1024) {
            uint64_t *page = memory + at * (PAGE / 8);
            uint64_t number = (round * pages + at) * 0x9E3779B97F4A7C15UL, before = number;

            if (round)
                before = ((round - 1) * pages + at) * 0x9E3779B97F4A7C15UL;
            if (round && (page[0] != before || page[511] != ~before)) {
                printf("MOVEBENCH-WRONG page %lu of round %lu\n", at, round);
                return 1;
            }
            page[0] = number;
            page[511] = ~number;
            if (++at == pages) {
                at = 0;
                round++;
            }
        }
    }
}
