/* Sends its own outputs into a pair of sockets that nobody can receive from, and ends: they stay open without it. */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

int main(void) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) return 1;
    int fds[4] = {pair[0], pair[1], 1, 2};
    char byte = 1, control[CMSG_SPACE(sizeof fds)];
    struct iovec data = {&byte, 1};
    struct msghdr message = {0};
    memset(control, 0, sizeof control);
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof fds);
    memcpy(CMSG_DATA(head), fds, sizeof fds);
    if (sendmsg(pair[1], &message, 0) != 1) return 2;
    printf("sent\n");
    fprintf(stderr, "away\n");
    return 7;
}
