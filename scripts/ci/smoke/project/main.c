/* Prints what the build machine could reach; built.h is written by the Makefile. */
#include <stdio.h>

int main(void) {
    puts(built);
    return 0;
}
