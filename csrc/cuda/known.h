// Answers that are asked for once, by any thread of the host. Torch-free, and free of CUDA.
#pragma once

#include <map>
#include <mutex>

namespace modxfer::device {

template <class Key, class Answer>
class Known {
 public:
  // answer = what is known of the key, or what ask(answer) finds. Returns the error of that, which
  // converts to true and is not kept: whoever comes next asks again.
  template <class Ask>
  auto find(const Key& key, Answer& answer, const Ask& ask) -> decltype(ask(answer)) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = answers_.find(key); found != answers_.end()) {
      answer = found->second;
      return {};
    }
    const auto error = ask(answer);
    if (!error) answers_.emplace(key, answer);
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Answer> answers_;
};

}  // namespace modxfer::device
