// What the machine has.
#pragma once

#include <cstddef>

namespace vptq::cpu {

int physical_cores();       // that this process may run on; at least 1
size_t available_memory();  // bytes that can be allocated without swapping, container limits heeded

// Gives the system back what malloc keeps of freed memory, where it can.
void return_freed_memory();

}  // namespace vptq::cpu
