# The libraries of the stages, added to the product's own build description: what they are compiled
# with is what it is compiled with. CMake reads this file at the product's project() when it is
# named by CMAKE_PROJECT_kdkernels_INCLUDE (library.py), and at no other time.
set(KDK_STAGES ${CMAKE_CURRENT_LIST_DIR})
set(KDK_STAGES_LEVEL "" CACHE STRING "Instruction-set level of the stages on a CPU: see KDK_LEVELS")
set(KDK_STAGES_DIVERGENCE ForwardKL CACHE STRING "Divergence of the stages on a GPU")

function(kdk_add_stages)
  add_library(stages_runtime OBJECT EXCLUDE_FROM_ALL csrc/tests/cuda_on_cpu/runtime.cpp)
  target_link_libraries(stages_runtime PRIVATE kdk_flags)

  foreach(exponentials yes no)
    set(suffix "")
    set(define "")
    if(exponentials STREQUAL no)
      set(suffix _no_exponentials)
      set(define KDK_NO_EXPONENTIALS=1)
    endif()

    set(name stages_cpu${suffix})
    add_library(${name} MODULE EXCLUDE_FROM_ALL ${KDK_STAGES}/cpu.cpp)
    target_compile_definitions(${name} PRIVATE KDK_ISA=baseline ${define})
    target_compile_options(${name} PRIVATE ${march_${KDK_STAGES_LEVEL}})
    target_link_libraries(${name} PRIVATE kdk_flags)

    set(name stages_cuda_on_cpu${suffix})
    add_library(${name} MODULE EXCLUDE_FROM_ALL ${KDK_STAGES}/cuda_on_cpu.cpp)
    target_compile_definitions(${name} PRIVATE
      KDK_CUDA_ON_CPU=1 KDK_DIVERGENCE=k${KDK_STAGES_DIVERGENCE} ${define})
    target_compile_options(${name} PRIVATE -O1)  # never timed
    target_link_libraries(${name} PRIVATE kdk_flags stages_runtime)

    if(KDK_CUDA)
      set(name stages_cuda${suffix})
      add_library(${name} MODULE EXCLUDE_FROM_ALL ${KDK_STAGES}/cuda.cu csrc/cuda/launch.cu)
      target_compile_definitions(${name} PRIVATE
        KDK_DIVERGENCE=k${KDK_STAGES_DIVERGENCE} ${define})
      target_link_libraries(${name} PRIVATE
        kdk_cuda_flags ${KDK_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
      set_target_properties(${name} PROPERTIES LINKER_LANGUAGE CXX)
    endif()
  endforeach()
endfunction()

cmake_language(DEFER CALL kdk_add_stages)
