# The tests that need an engine.

# The library as a program sees it; of its insides only the sum that seals a bundle.
add_executable(api-tests api_test.cpp batcher_api_test.cpp captions_test.cpp model_test.cpp pictures_test.cpp
  ports_test.cpp  prompt_calls_test.cpp refusals_test.cpp run_test.cpp service_test.cpp sizes_test.cpp ../src/sha256.cpp
  ../src/errors.cpp)
target_include_directories(api-tests PRIVATE ../src)
target_link_libraries(api-tests PRIVATE dit::dit GTest::gtest_main nlohmann_json::nlohmann_json Threads::Threads)

foreach(measurement cancel threads)
  add_executable(${measurement} ${measurement}.cpp)
  target_link_libraries(${measurement} PRIVATE dit::dit Threads::Threads)
endforeach()
foreach(measurement bench cost)
  add_executable(${measurement} ${measurement}.cpp)
  target_link_libraries(${measurement} PRIVATE dit_core ${linked})
endforeach()

# The engines of NVIDIA GPUs, each alone with the library's other insides, on doubles of CUDA and of TensorRT.
set(insides $<TARGET_OBJECTS:dit_core> ../src/backends_linked.cpp)
set(device_tests "")
foreach(flavour tensorrt tensorrt-rtx)
  add_executable(${flavour}-tests trt_test.cpp ../src/engine_trt.cpp ${insides})
  target_compile_definitions(${flavour}-tests PRIVATE DIT_TENSORRT="${flavour}")
  list(APPEND device_tests ${flavour}-tests)
endforeach()
target_compile_definitions(tensorrt-rtx-tests PRIVATE DOUBLE_OF_RTX)
if(ONNXRuntime_FOUND)
  add_library(ort_insides OBJECT ../src/engine_ort.cpp ../src/ort_placement.cpp ../src/backends_linked.cpp)
  set(ort_insides $<TARGET_OBJECTS:ort_insides> $<TARGET_OBJECTS:dit_core>)
  add_executable(ort-cuda-tests ort_cuda_test.cpp device_loop_test.cpp doubles/ort_double.cpp ../src/engine_ort_cuda.cpp
    ${ort_insides})
  list(APPEND device_tests ort-cuda-tests)
  # CUDA's own headers and static runtime: the engine links with them, and says that there is no GPU.
  find_path(CUDA_TEST_INCLUDE_DIR cuda_runtime_api.h HINTS "${CUDA_ROOT}" "${CUDA_TEST_ROOT}" PATH_SUFFIXES include)
  find_library(CUDA_TEST_LIBRARY cudart_static HINTS "${CUDA_ROOT}" "${CUDA_TEST_ROOT}" PATH_SUFFIXES lib lib64)
  set(cuda_tests ort-cuda-tests)
  if(CUDA_TEST_INCLUDE_DIR AND CUDA_TEST_LIBRARY)
    add_executable(cuda-link-tests cuda_link_test.cpp ../src/engine_ort_cuda.cpp ${ort_insides})
    target_include_directories(cuda-link-tests SYSTEM PRIVATE "${CUDA_TEST_INCLUDE_DIR}")
    target_link_libraries(cuda-link-tests PRIVATE "${CUDA_TEST_LIBRARY}" ONNXRuntime::ONNXRuntime GTest::gtest_main
      Threads::Threads ${CMAKE_DL_LIBS} rt)
    list(APPEND cuda_tests cuda-link-tests)
  endif()
  foreach(target ort_insides ${cuda_tests})
    target_compile_definitions(${target} PRIVATE DIT_CUDA DIT_ONNXRUNTIME ONNXRUNTIME="${ONNXRuntime_LIBRARY}")
    target_include_directories(${target} SYSTEM PRIVATE "${ONNXRuntime_INCLUDE_DIR}")
    target_include_directories(${target} PRIVATE ../src ../include)
  endforeach()
endif()
foreach(tests ${device_tests})
  target_include_directories(${tests} BEFORE PRIVATE doubles)
  target_include_directories(${tests} PRIVATE ../src ../include)
  target_link_libraries(${tests} PRIVATE GTest::gtest_main nlohmann_json::nlohmann_json Threads::Threads ${CMAKE_DL_LIBS})
endforeach()

if(TARGET cuda-link-tests)
  list(APPEND device_tests cuda-link-tests)
endif()
list(APPEND all_tests api-tests ${device_tests})
