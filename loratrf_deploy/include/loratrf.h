// The operators of loratrf-deploy in ONNX Runtime, for C and C++.
//
//   Ort::SessionOptions options;
//   Ort::ThrowOnError(RegisterCustomOps(options, OrtGetApiBase()));
//   Ort::Session session(env, "model.onnx", options);
//
// Link loratrf::loratrf (find_package(loratrf)) for that, or let ONNX Runtime open the library by its path:
// options.RegisterCustomOpsLibrary("libloratrf_ort.so"). Without either the same model runs, by the operators'
// definitions in the file. Adapters (.onnx_adapter) are ONNX Runtime's own: Ort::LoraAdapter.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// ONNX Runtime's; no header of its is needed here.
struct OrtApiBase;
struct OrtSessionOptions;
struct OrtStatus;

// Adds the operators of the domain com.loratrf to `options`, for the CPU and, in a build with them, for CUDA. Any
// number of sessions may do so, from any thread. `api` is OrtGetApiBase(), of ONNX Runtime 1.18 or later. Returns NULL,
// or what went wrong, which the caller releases (OrtApi::ReleaseStatus).
struct OrtStatus* RegisterCustomOps(struct OrtSessionOptions* options, const struct OrtApiBase* api);

#ifdef __cplusplus
}
#endif
