/* In QEMU's place: the same QEMU, but a clone gets another processor model than the machine that was saved had. */
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
    int clone = 0;
    for (int i = 1; i < argc; i++)
        clone |= !strcmp(argv[i], "-incoming");
    for (int i = 1; i + 1 < argc; i++)
        if (clone && !strcmp(argv[i], "-cpu")) argv[i + 1] = "Nehalem";
    argv[0] = QEMU;
    execv(argv[0], argv);
    return 127;
}
