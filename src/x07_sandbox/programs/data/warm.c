/* Run once in a machine before it waits in a pool: what most programs do, so that its processor has met it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int main(void) {
    char line[128];
    char *copy = malloc(1 << 16);
    if (!copy || !fgets(line, sizeof line, stdin)) return 1;
    memset(copy, 0, 1 << 16);
    strcpy(copy, line);
    fprintf(stderr, "%ld\n", (long)time(NULL));
    printf("warm %s", copy);
    free(copy);
    return 0;
}
