# Finds CUDA's headers and static runtime under CUDA_ROOT or where the toolkit is installed: the target
# CUDARuntime::CUDARuntime. The static one asks for no CUDA where libdit is loaded.
find_path(CUDARuntime_INCLUDE_DIR cuda_runtime_api.h
  HINTS "${CUDA_ROOT}" PATHS /usr/local/cuda
  PATH_SUFFIXES include)
find_library(CUDARuntime_LIBRARY cudart_static
  HINTS "${CUDA_ROOT}" PATHS /usr/local/cuda
  PATH_SUFFIXES lib lib64)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CUDARuntime REQUIRED_VARS CUDARuntime_LIBRARY CUDARuntime_INCLUDE_DIR)
mark_as_advanced(CUDARuntime_LIBRARY CUDARuntime_INCLUDE_DIR)

if(CUDARuntime_FOUND AND NOT TARGET CUDARuntime::CUDARuntime)
  find_package(Threads REQUIRED)
  add_library(CUDARuntime::CUDARuntime UNKNOWN IMPORTED)
  set_target_properties(CUDARuntime::CUDARuntime PROPERTIES
    IMPORTED_LOCATION "${CUDARuntime_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${CUDARuntime_INCLUDE_DIR}")
  target_link_libraries(CUDARuntime::CUDARuntime INTERFACE Threads::Threads ${CMAKE_DL_LIBS})
  if(UNIX AND NOT APPLE)
    target_link_libraries(CUDARuntime::CUDARuntime INTERFACE rt)
  endif()
endif()
