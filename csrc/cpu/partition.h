// How work is cut for threads: of several ways, the one whose longest share costs least.
//
// at::parallel_for gives each thread the same number of consecutive tasks, the last one what is left. More tasks share
// the work more evenly; but each costs what its neighbours compute, too, around its border, or the work that all begin
// with.
#pragma once

#include <stdint.h>

#include <limits>

namespace ipt_fast::cpu {

// The most of `tasks` equal ones that one of the threads gets.
inline int64_t longest_share(int64_t tasks, int64_t threads) { return (tasks + threads - 1) / threads; }

// body(pieces) for the ways to cut `total` things into at least `fewest` pieces, each way with a smaller largest piece.
template <typename Body>
void for_cuts(int64_t total, int64_t fewest, const Body& body) {
    for (int64_t pieces = fewest, largest = 2; largest > 1;) {
        body(pieces);
        largest = (total + pieces - 1) / pieces;
        pieces = largest > 1 ? (total + largest - 2) / (largest - 1) : pieces;
    }
}

// The first one of the ways with the least cost.
template <typename Way>
class Cheapest {
  public:
    void offer(const Way& way, double cost) {
        if (cost < cost_) {
            way_ = way;
            cost_ = cost;
        }
    }
    const Way& way() const { return way_; }

  private:
    Way way_{};
    double cost_ = std::numeric_limits<double>::infinity();
};

}  // namespace ipt_fast::cpu
