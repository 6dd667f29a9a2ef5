// What the host keeps of a device, asked for by threads of the host, which no checker of kernels
// follows: a library of its own.
#include "known.h"

#include <atomic>
#include <thread>
#include <vector>

using namespace modxfer;

extern "C" {

// How often keys 0 to `keys` - 1 were asked for by so many threads, each of which wants every key
// twice and, the first time that a key is asked for, meets an error. Below 0: a wrong answer.
int asked_by_threads(int threads, int keys) {
  device::Known<int, int> known;
  std::atomic<int> asked = 0, wrong = 0;
  std::vector<std::atomic<bool>> failed(keys);
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&] {
      for (int key = 0; key < 2 * keys; ++key) {
        const int own = key % keys;
        int answer = 0;
        const auto ask = [&](int& found) {
          ++asked;
          if (!failed[own].exchange(true)) return 1;
          found = 10 * own;
          return 0;
        };
        while (known.find(own, answer, ask) != 0) {
        }
        wrong += answer != 10 * own;
      }
    });
  }
  for (auto& thread : all) thread.join();
  return wrong > 0 ? -1 : asked.load();
}

}  // extern "C"
