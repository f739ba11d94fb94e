// ONNX Runtime's statuses inside the custom-op library: thrown on the way out, a status again at the border.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "check.h"
#include "ort_c_api.h"

namespace loratrf {
namespace ort {

// Null if nothing was wrong. What a device or memory refuses is no fault of the arguments.
inline OrtStatus* Error(const OrtApi* api, const Fault& fault) {
  if (!fault) return nullptr;
  const bool is_callers = fault.status != Status::kDevice && fault.status != Status::kOutOfMemory;
  return CreateStatus(api)(is_callers ? kInvalidArgument : kFail, fault.message.c_str());
}

// A failed call of ONNX Runtime's own, on its way out of a function that returns an OrtStatus.
struct Failed {
  OrtStatus* status;
};

inline void Check(OrtStatus* status) {
  if (status) throw Failed{status};
}

// Runs body and turns whatever it throws into a status.
template <class Body>
OrtStatus* Guard(const OrtApi* api, Body&& body) noexcept {
  try {
    return body();
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::bad_alloc&) {
    return CreateStatus(api)(kFail, "loratrf: out of memory");
  } catch (const std::exception& error) {
    return CreateStatus(api)(kFail, error.what());
  } catch (...) {
    return CreateStatus(api)(kFail, "loratrf: unknown error");
  }
}

}  // namespace ort
}  // namespace loratrf
