#include "graph.h"

#include <queue>
#include <sstream>

Graph Graph::read(std::istream &in) {
    Graph graph;
    std::string line, one, other;
    int km;
    while (std::getline(in, line)) {
        std::istringstream words(line);
        if (words >> one >> other >> km) {
            graph.roads_[one].emplace_back(other, km);
            graph.roads_[other].emplace_back(one, km);
        }
    }
    return graph;
}

std::vector<std::pair<int, std::string>> Graph::distances(const std::string &from) const {
    using Step = std::pair<int, std::string>;
    std::priority_queue<Step, std::vector<Step>, std::greater<>> next;
    std::map<std::string, int> best;
    std::vector<Step> found;
    next.emplace(0, from);
    while (!next.empty()) {
        auto [km, town] = next.top();
        next.pop();
        if (!best.emplace(town, km).second) continue;
        found.emplace_back(km, town);
        if (auto roads = roads_.find(town); roads != roads_.end())
            for (const auto &[other, length] : roads->second) next.emplace(km + length, other);
    }
    return found;
}
