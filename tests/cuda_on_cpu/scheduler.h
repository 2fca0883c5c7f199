// What does engine.cpp, which runs the threads of a launch, share with launch.cpp?
#pragma once

#include <string>

#include "engine.h"

namespace cuda_on_cpu {

extern bool failed;  // the launch broke a rule of CUDA, and which one
extern std::string failure;
extern uint64_t order;             // which way threads and blocks run; see Order
extern std::string grid_barriers;  // of the last cooperative launch: a line each

void fail(const std::string& message);
std::string text(uint3 v);
void run_grid(dim3 grid, dim3 block, size_t shared, bool cooperative, Body body, const void* context);

}  // namespace cuda_on_cpu
