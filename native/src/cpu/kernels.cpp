#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>

#include "vptq/error.h"

namespace vptq::cpu {

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx2vnni, kernels_avx512, kernels_avx512vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows these two.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
bool has_avxvnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1 << 4);
}
#endif

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> best_first;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512vnni")) best_first.push_back(&kernels_avx512vnni);
    best_first.push_back(&kernels_avx512);
  }
  if (avx2 && has_avxvnni()) best_first.push_back(&kernels_avx2vnni);
  if (avx2) best_first.push_back(&kernels_avx2);
#elif defined(__aarch64__)
  best_first.push_back(&kernels_neon);  // every such processor has it
#endif
  best_first.push_back(&kernels_generic);
  return best_first;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->isa);
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  const char* forced = std::getenv("VPTQ_CPU_ISA");
  const std::string wanted = isa.empty() && forced ? forced : isa;
  std::string names;
  for (const Kernels* kernels : available()) {
    if (wanted.empty() || wanted == kernels->isa) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw OptionError("instruction set '" + wanted + "' (VPTQ_CPU_ISA), expected one that this processor has: " + names);
}

}  // namespace vptq::cpu
