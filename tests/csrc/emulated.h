// What the libraries of emulated kernels share.
#pragma once

#include <string>

#include "device.cuh"

inline void set_schedule(uint64_t seed) {
  modxfer::emulator::schedule() = modxfer::emulator::Schedule::of(seed);
}

inline std::string fault;

// An empty text, or what the kernel did wrong.
template <class Launch>
const char* fault_of(const Launch& launch) {
  fault.clear();
  try {
    launch();
  } catch (const modxfer::emulator::Fault& found) {
    fault = found.what();
  }
  return fault.c_str();
}
