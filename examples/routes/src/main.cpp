#include "graph.h"

#include <cstdio>
#include <iostream>

int main(int argc, char **argv) {
    if (argc != 2) {
        std::cerr << "usage: routes TOWN < roads\n";
        return 2;
    }
    for (const auto &[km, town] : Graph::read(std::cin).distances(argv[1])) std::printf("%5d %s\n", km, town.c_str());
}
