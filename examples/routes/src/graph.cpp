#include "graph.h"

#include <climits>
#include <cstring>

int Graph::find(const char *town) const {
    for (int n = 0; n < count_; n++)
        if (std::strcmp(names_[n], town) == 0) return n;
    return -1;
}

int Graph::number(const char *town) {
    int known = find(town);
    if (known >= 0 || count_ == max_towns) return known;
    std::strncpy(names_[count_], town, sizeof names_[0] - 1);
    return count_++;
}

bool Graph::add(const char *one, const char *other, int km) {
    int a = number(one), b = number(other);
    if (a < 0 || b < 0) return false;
    roads_[a][b] = roads_[b][a] = km;
    return true;
}

void Graph::distances(const char *from, void (*report)(const char *town, int km)) const {
    int best[max_towns], start = find(from);
    bool done[max_towns] = {};
    for (int &km : best) km = INT_MAX;
    if (start >= 0) best[start] = 0;
    for (;;) {
        int next = -1;
        for (int n = 0; n < count_; n++)
            if (!done[n] && best[n] != INT_MAX && (next < 0 || best[n] < best[next])) next = n;
        if (next < 0) return;
        done[next] = true;
        report(names_[next], best[next]);
        for (int n = 0; n < count_; n++)
            if (roads_[next][n] && best[next] + roads_[next][n] < best[n]) best[n] = best[next] + roads_[next][n];
    }
}
