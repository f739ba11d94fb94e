// What the library shows of itself, on every system; all else is hidden.
#pragma once

#ifdef _WIN32
#define LORATRF_EXPORT extern "C" __declspec(dllexport)
#else
#define LORATRF_EXPORT extern "C" __attribute__((visibility("default")))
#endif
