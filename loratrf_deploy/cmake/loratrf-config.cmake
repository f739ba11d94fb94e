# find_package(loratrf): the imported library loratrf::loratrf. It finds its files from where it lies, in a Python package
# (`loratrf-config --cmakedir`) as in a prefix of `cmake --install`.
if(NOT TARGET loratrf::loratrf)
  foreach(_loratrf_root "${CMAKE_CURRENT_LIST_DIR}/.." "${CMAKE_CURRENT_LIST_DIR}/../../..")
    foreach(_loratrf_file libloratrf_ort.so lib/libloratrf_ort.so lib64/libloratrf_ort.so libloratrf_ort.dylib
                          lib/libloratrf_ort.dylib loratrf_ort.dll bin/loratrf_ort.dll)
      if(NOT _loratrf_library AND EXISTS "${_loratrf_root}/${_loratrf_file}" AND EXISTS "${_loratrf_root}/include/loratrf.h")
        get_filename_component(_loratrf_library "${_loratrf_root}/${_loratrf_file}" ABSOLUTE)
        get_filename_component(_loratrf_include "${_loratrf_root}/include" ABSOLUTE)
      endif()
    endforeach()
  endforeach()
  if(_loratrf_library)
    add_library(loratrf::loratrf SHARED IMPORTED)
    set_target_properties(loratrf::loratrf PROPERTIES IMPORTED_LOCATION "${_loratrf_library}"
                                                      INTERFACE_INCLUDE_DIRECTORIES "${_loratrf_include}")
  else()
    set(loratrf_FOUND FALSE)
    set(loratrf_NOT_FOUND_MESSAGE
        "the library isn't built: install the wheel, or run cmake --build and cmake --install (docs/cpp.md)")
  endif()
  unset(_loratrf_library)
  unset(_loratrf_include)
endif()
