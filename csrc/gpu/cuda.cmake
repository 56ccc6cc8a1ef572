# The CUDA kernels of gptcore._C, if nvcc is found. GPTCORE_CUDA_PROBLEM is the reason if they are not built, else "".
#
# nvcc is called directly: the code of all architectures is assembled from one compute_80 PTX per file, while CMake's
# CUDA support would compile a file once for each architecture. Nor does CMake find an nvcc from PyPI.

function(gptcore_setting name default help)
  if(NOT DEFINED ${name} AND NOT "$ENV{${name}}" STREQUAL "")
    set(default "$ENV{${name}}")
  endif()
  set(${name} "${default}" CACHE STRING "${help}")
endfunction()
gptcore_setting(GPTCORE_CUDA AUTO "AUTO: build the CUDA kernels if there is an nvcc. ON: fail without one. OFF")
gptcore_setting(GPTCORE_CUDA_ARCHS "" "Such as 80;90. Default: those of the GPUs present, else all supported")
string(TOUPPER "${GPTCORE_CUDA}" GPTCORE_CUDA_WANTED)
if(NOT GPTCORE_CUDA_WANTED MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "GPTCORE_CUDA is '${GPTCORE_CUDA}', expected AUTO, ON or OFF")
endif()

set(GPTCORE_CUDA_SUPPORTED 80 86 89 90 100 120)
set(GPTCORE_CUDA_HINT "pip install nvidia-cuda-nvcc")
set(GPTCORE_CUDA_PROBLEM "")
if(GPTCORE_CUDA_WANTED STREQUAL "OFF")
  set(GPTCORE_CUDA_PROBLEM "built with GPTCORE_CUDA=OFF")
endif()

# ---- nvcc: from PATH, from a toolkit, or from PyPI -------------------------------------------------------------------

if(NOT GPTCORE_CUDA_PROBLEM)
  # purelib: the packages outside of pip's isolated build environment
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import sys, sysconfig; print(';'.join(p for p in [*sys.path, sysconfig.get_path('purelib')] if 'packages' in p))"
    OUTPUT_VARIABLE packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(wheels)
  foreach(folder IN LISTS packages)
    file(GLOB found LIST_DIRECTORIES true "${folder}/nvidia/cu[0-9]*" "${folder}/nvidia/cuda_nvcc")
    list(APPEND wheels ${found})
  endforeach()
  find_program(GPTCORE_NVCC nvcc HINTS ENV CUDACXX PATHS ENV PATH NO_DEFAULT_PATH)
  find_program(GPTCORE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda ${wheels} PATH_SUFFIXES bin)
  if(NOT GPTCORE_NVCC)
    set(GPTCORE_CUDA_PROBLEM "no nvcc in PATH, CUDA_HOME, /usr/local/cuda or this Python's packages")
  endif()
endif()

# Check that nvcc works with the C++ compiler and the headers, and find the CUDA runtime.
if(NOT GPTCORE_CUDA_PROBLEM)
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/probe.cu")
  file(WRITE "${probe}" "#include <cuda_runtime.h>\n__global__ void probe() {}\n")
  set(GPTCORE_NVCC_FLAGS -std=c++17 -O3 -ccbin "${CMAKE_CXX_COMPILER}" -cudart static)
  execute_process(COMMAND "${GPTCORE_NVCC}" ${GPTCORE_NVCC_FLAGS} -arch=compute_80 -c "${probe}" -o "${probe}.o"
    RESULT_VARIABLE failed OUTPUT_VARIABLE errors ERROR_VARIABLE errors)
  execute_process(COMMAND "${GPTCORE_NVCC}" --list-gpu-code OUTPUT_VARIABLE codes ERROR_QUIET)
  execute_process(COMMAND "${GPTCORE_NVCC}" --version OUTPUT_VARIABLE version ERROR_QUIET)
  execute_process(COMMAND "${GPTCORE_NVCC}" -dryrun "${probe}" ERROR_VARIABLE dryrun OUTPUT_VARIABLE dryrun)
  string(REGEX MATCH "TOP=([^\n]+)" top "${dryrun}")
  get_filename_component(top "${CMAKE_MATCH_1}" ABSOLUTE)
  find_library(GPTCORE_CUDART libcudart_static.a
    PATHS "${top}/lib64" "${top}/lib" "${top}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib"
      "${top}/../cuda_runtime/lib" NO_DEFAULT_PATH)
  find_library(GPTCORE_CUDART libcudart_static.a PATH_SUFFIXES x86_64-linux-gnu)
  string(REGEX MATCH "V[0-9.]+" version "${version}")
  if(failed)
    string(STRIP "${errors}" errors)
    set(GPTCORE_CUDA_PROBLEM "${GPTCORE_NVCC} could not compile: ${errors}")
  elseif(NOT GPTCORE_CUDART)
    set(GPTCORE_CUDA_PROBLEM "${GPTCORE_NVCC} has no libcudart_static.a")
  endif()
endif()

# ---- the architectures -----------------------------------------------------------------------------------------------

if(NOT GPTCORE_CUDA_PROBLEM)
  string(REGEX MATCHALL "[0-9]+" codes "${codes}")
  string(REPLACE "." "" archs "${GPTCORE_CUDA_ARCHS}")  # 8.0 means 80
  string(REGEX REPLACE "[^0-9]+" ";" archs "${archs}")
  list(REMOVE_ITEM archs "")
  if(GPTCORE_CUDA_ARCHS)
    foreach(arch IN LISTS archs)
      if(NOT arch IN_LIST codes OR arch LESS 80)
        message(FATAL_ERROR "GPTCORE_CUDA_ARCHS contains ${arch}, expected 80 or more, and supported by "
          "${GPTCORE_NVCC}: ${codes}")
      endif()
    endforeach()
    set(chosen "GPTCORE_CUDA_ARCHS")
  else()
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE present ERROR_QUIET RESULT_VARIABLE failed)
    set(archs)
    if(failed STREQUAL "0")
      string(REPLACE "." "" present "${present}")
      string(REGEX MATCHALL "[0-9]+" archs "${present}")
      list(REMOVE_DUPLICATES archs)
      set(chosen "of the GPUs present")
    endif()
    set(wanted ${archs})
    if(NOT wanted)
      set(wanted ${GPTCORE_CUDA_SUPPORTED})
      set(chosen "all supported: no GPU found")
    endif()
    set(archs)
    foreach(arch IN LISTS wanted)
      if(arch IN_LIST codes AND NOT arch LESS 80)
        list(APPEND archs ${arch})
      else()
        message(STATUS "CUDA: ${GPTCORE_NVCC} does not support sm_${arch}")
      endif()
    endforeach()
  endif()
  list(TRANSFORM archs PREPEND "sm_")
  # Files *_sm90.cu use instructions that only sm_90a has, and are compiled for it alone.
  set(GPTCORE_SM90)
  if("sm_90" IN_LIST archs)
    execute_process(COMMAND "${GPTCORE_NVCC}" ${GPTCORE_NVCC_FLAGS} -arch=sm_90a -c "${probe}" -o "${probe}.o"
      RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
    if(failed)
      message(STATUS "CUDA: ${GPTCORE_NVCC} does not support sm_90a")
    else()
      set(GPTCORE_SM90 -DGPTCORE_SM90)
    endif()
  endif()
  list(APPEND archs compute_80)  # PTX for newer GPUs
  list(JOIN archs "," codes)
endif()

# ---- the build -------------------------------------------------------------------------------------------------------

if(GPTCORE_CUDA_PROBLEM)
  if(GPTCORE_CUDA_WANTED STREQUAL "ON")
    message(FATAL_ERROR "GPTCORE_CUDA=ON, but the CUDA kernels cannot be built: ${GPTCORE_CUDA_PROBLEM}\n"
      "Install a CUDA toolkit, or the compiler from PyPI:\n  ${GPTCORE_CUDA_HINT}")
  endif()
  message(STATUS "CUDA: no kernels: ${GPTCORE_CUDA_PROBLEM}")
  if(NOT GPTCORE_CUDA_WANTED STREQUAL "OFF")
    string(APPEND GPTCORE_CUDA_PROBLEM ": install a CUDA toolkit, or ${GPTCORE_CUDA_HINT}, then reinstall gptcore")
  endif()
  # Remove characters that are special in a CMake list, a C++ string or a generator expression
  string(REGEX REPLACE "[\r\n\"\\;$]+" " " problem "${GPTCORE_CUDA_PROBLEM}")
  target_compile_definitions(_C PRIVATE "GPTCORE_CUDA_PROBLEM=\"${problem}\"")
  return()
endif()
message(STATUS "CUDA: ${GPTCORE_NVCC} ${version}, for ${codes} (${chosen})")

# One nvcc needs up to 1 GB. Run one per core, within half of the memory.
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
cmake_host_system_information(RESULT memory QUERY TOTAL_PHYSICAL_MEMORY)  # in MiB
math(EXPR jobs "${memory} / 2048")
if(jobs GREATER cores)
  set(jobs ${cores})
elseif(jobs LESS 1)
  set(jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS nvcc=${jobs})

file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/gpu/*.cu")
foreach(source IN LISTS sources)
  get_filename_component(name "${source}" NAME_WE)
  set(target "arch=compute_80,code=[${codes}]")
  if(name MATCHES "_sm90$")
    if(NOT GPTCORE_SM90)
      continue()
    endif()
    set(target "arch=compute_90a,code=sm_90a")
  endif()
  set(object "${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o")
  add_custom_command(OUTPUT "${object}"
    COMMAND "${GPTCORE_NVCC}" ${GPTCORE_NVCC_FLAGS} -Xcompiler -fPIC,-fvisibility=hidden,-Wall
      -Xfatbin -compress-all --threads 2
      "-gencode" "${target}" -DGPTCORE_GPU=cuda ${GPTCORE_SM90} "-I${CMAKE_CURRENT_SOURCE_DIR}"
      -MD -MF "${object}.d" -c "${source}" -o "${object}"
    DEPENDS "${source}" DEPFILE "${object}.d" JOB_POOL nvcc COMMENT "nvcc ${name}.cu" VERBATIM)
  target_sources(_C PRIVATE "${object}")
  set_source_files_properties("${object}" PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
endforeach()
target_link_libraries(_C PRIVATE "${GPTCORE_CUDART}" ${CMAKE_DL_LIBS} rt pthread)
target_link_options(_C PRIVATE -Wl,--exclude-libs,ALL)  # do not call the CUDA runtime of PyTorch
target_compile_definitions(_C PRIVATE GPTCORE_GPU=cuda "GPTCORE_CUDA_ARCHS=\"${codes}\""
  "GPTCORE_NVCC_VERSION=\"${version}\"")
