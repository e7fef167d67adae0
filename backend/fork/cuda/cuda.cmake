# The CCQ types on NVIDIA GPUs; the last of ggml-cuda/CMakeLists.txt includes this.

# Earlier GPUs than Turing leave our types to the CPU, and the kernels cannot be compiled for them.
set(GGML_CCQ_ARCHITECTURES "")
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
  if(architecture MATCHES "^all" OR (architecture MATCHES "^([0-9]+)" AND CMAKE_MATCH_1 LESS 75))
    set(architecture 75-virtual)
  endif()
  list(APPEND GGML_CCQ_ARCHITECTURES ${architecture})
endforeach()
list(REMOVE_DUPLICATES GGML_CCQ_ARCHITECTURES)

# Apart from ggml-cuda's own sources, which are compiled with -use_fast_math: decoding is bit-exact, and activations are
# rounded as on the CPU.
add_library(ggml-ccq-cuda OBJECT ${CMAKE_CURRENT_LIST_DIR}/backend.cu)
set_target_properties(ggml-ccq-cuda PROPERTIES
  CUDA_ARCHITECTURES "${GGML_CCQ_ARCHITECTURES}"
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  POSITION_INDEPENDENT_CODE ON)
target_include_directories(ggml-ccq-cuda PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/../../include)
target_compile_options(ggml-ccq-cuda PRIVATE -fmad=false -ftz=false -prec-div=true -prec-sqrt=true)

target_compile_definitions(ggml-cuda PRIVATE GGML_CCQ_CUDA)
target_sources(ggml-cuda PRIVATE $<TARGET_OBJECTS:ggml-ccq-cuda>)
if(BUILD_SHARED_LIBS)
  target_sources(ggml-cuda PRIVATE ${GGML_CCQ_OBJECTS}) # a static ggml-base has them
endif()
