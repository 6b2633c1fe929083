// Which of some tokens it becomes.
#pragma once

#include <vector>

#include "vptq/candidate.h"
#include "vptq/sampler.h"

namespace vptq {

// Draws from candidates, one at least: top-p and min-p, of the probabilities before temperature, then by those with it.
// sorted: the likeliest is the first, and so on; else they are in the order of their tokens. at: from 0 to 1,
// without 1.
int32_t draw(std::vector<Candidate>& candidates, bool sorted, const SamplingOptions& options, double at);

}  // namespace vptq
