// One team of worker threads for the process: started when first needed, forgotten in a forked child.
#pragma once

#include <functional>

namespace fusedopt {

// Calls work(worker) for worker 0 .. workers−1, worker 0 on the calling thread, and returns when all have returned.
// Every worker computes in the default floating-point mode: nearest even, denormals kept. Where another thread uses
// the team right now, the calling thread does all of the work itself, one worker after another.
void run_team(int workers, const std::function<void(int worker)>& work);

}  // namespace fusedopt
