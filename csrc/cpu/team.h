// One team of worker threads for the process: started when first needed, forgotten in a forked child.
#pragma once

#include <functional>

namespace fusedopt {

// Calls work(worker) for worker 0 on the calling thread and for up to workers−1 others, and returns when all that began
// have returned. A worker that comes too late is not called: `work` must share out its task as it goes, so that worker
// 0 alone would finish it. That matters beside torch, whose own threads spin for milliseconds after a parallel region
// and may hold the cores. Every worker computes in the default floating-point mode: nearest even, denormals kept. Where
// another thread uses the team right now, the calling thread works alone.
void run_team(int workers, const std::function<void(int worker)>& work);

}  // namespace fusedopt
