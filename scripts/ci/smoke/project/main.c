/* Print what the build could reach. The Makefile writes built.h. */
#include <stdio.h>

int main(void) {
    puts(built);
    return 0;
}
