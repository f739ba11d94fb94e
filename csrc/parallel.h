// A parallel-for for hosts that bring none: worker threads that live as long as the process.
#pragma once

#include "kernels/loratrf.h"

namespace loratrf {

// Work on up to *threads threads, the caller's included; *threads outlives the result. Callers on several threads take
// turns for the workers; one that finds them taken works alone. A forked child starts workers of its own.
ParallelFor Threads(const int* threads);

}  // namespace loratrf
