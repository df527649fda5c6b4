#pragma once
#include <istream>
#include <map>
#include <string>
#include <vector>

// Towns, and the roads between them, in kilometres.
class Graph {
public:
    static Graph read(std::istream &in);
    // The shortest way from one town to each that can be reached, nearest first.
    std::vector<std::pair<int, std::string>> distances(const std::string &from) const;

private:
    std::map<std::string, std::vector<std::pair<std::string, int>>> roads_;
};
