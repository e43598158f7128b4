// The threads that operations run on.

#include <omp.h>
#include <sched.h>

extern "C" {

// Keep the calling thread and those that help it, `threads` in all, to one CPU each: cpus[i] is thread i's. Returns how many
// could not be kept there.
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
