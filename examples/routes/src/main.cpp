#include "graph.h"

#include <cstdio>

int main(int argc, char **argv) {
    static Graph graph;
    char one[64], other[64];
    int km;
    if (argc != 2) {
        std::fputs("usage: routes TOWN < roads\n", stderr);
        return 2;
    }
    while (std::scanf("%63s %63s %d", one, other, &km) == 3)
        if (!graph.add(one, other, km)) return 1;
    graph.distances(argv[1], [](const char *town, int way) { std::printf("%5d %s\n", way, town); });
}
