#pragma once

// Towns, and the roads between them, in kilometres.
class Graph {
public:
    static constexpr int max_towns = 100;

    // Adds a road between two towns, whose names have at most 63 bytes. Returns false if there are too many towns.
    bool add(const char *one, const char *other, int km);
    // Calls report with the distance to each reachable town, nearest first.
    void distances(const char *from, void (*report)(const char *town, int km)) const;

private:
    int find(const char *town) const;
    int number(const char *town);

    char names_[max_towns][64] = {};
    int roads_[max_towns][max_towns] = {};  // 0: no road
    int count_ = 0;
};
