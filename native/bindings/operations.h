// A backend's operations over numpy arrays, for tests.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "vptq/model.h"

namespace vptq::bindings {

using Array2 = nanobind::ndarray<nanobind::numpy, float, nanobind::ndim<2>>;

Array2 new_array(size_t rows, size_t columns);
Array2 dequantized(const LinearWeights& layer);  // (out_features, in_features)

void bind_operations(nanobind::module_& m);

}  // namespace vptq::bindings
