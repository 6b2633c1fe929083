// Lambdas as one overload set, for std::visit: an alternative that none of them takes is an error of the compiler's.
#pragma once

namespace vptq {

template <class... Functions>
struct Overloaded : Functions... {
  using Functions::operator()...;
};
template <class... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

}  // namespace vptq
