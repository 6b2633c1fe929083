// A token that may come next.
#pragma once

#include <cstdint>

namespace vptq {

struct alignas(8) Candidate {
  int32_t token;
  float logit;
};

}  // namespace vptq
