#pragma once

// Towns, and the roads between them, in kilometres.
class Graph {
public:
    static constexpr int most = 100;

    // Towns are known by their names, of at most 63 bytes. False where there is no room for another.
    bool add(const char *one, const char *other, int km);
    // Tells the shortest way from one town to each that can be reached, nearest first.
    void distances(const char *from, void (*tell)(const char *town, int km)) const;

private:
    int find(const char *town) const;
    int number(const char *town);

    char names_[most][64] = {};
    int roads_[most][most] = {};  // 0: there is none
    int count_ = 0;
};
