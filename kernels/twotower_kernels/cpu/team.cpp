// Pins the threads that operations run on.

#include <omp.h>
#include <sched.h>

extern "C" {

// Pins the calling thread and its helpers, `threads` in all, to one CPU each: cpus[i] is thread i's. Returns the number of
// threads that could not be pinned.
int tt_pin(const int* cpus, int threads) {
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    cpu_set_t own;
    CPU_ZERO(&own);
    CPU_SET(cpus[omp_get_thread_num()], &own);
    if (sched_setaffinity(0, sizeof(own), &own)) {
#pragma omp atomic
      failed++;
    }
  }
  return failed;
}

}  // extern "C"
