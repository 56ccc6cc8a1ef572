"""The CUDA build on a machine without a GPU, and arguments that raise before a launch."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptcore import _C, ops
from gptcore.ops import native
from gptcore.ops.attention import Settings

built = pytest.mark.skipif(
    not _C.cuda_archs() and os.environ.get("GPTCORE_CUDA", "AUTO").upper() != "ON", reason="built without CUDA kernels"
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def as_if_on_a_gpu(tensor: torch.Tensor, patch: pytest.MonkeyPatch) -> torch.Tensor:
    """The same memory as a tensor on cuda:0, as DLPack would hand it over: nothing here may read it as one."""
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer(capsule, b"dltensor")
    cuda = 2
    (ctypes.c_int32 * 2).from_address(address + ctypes.sizeof(ctypes.c_void_p))[:] = [cuda, 0]  # after the data pointer
    return torch.from_dlpack(capsule)


@built
@no_gpu
def test_without_a_driver_it_imports_and_says_what_it_was_built_for() -> None:
    reason = ops.backends()["cuda"]
    assert reason is not None
    assert re.fullmatch(r"built for sm_\d+(, sm_\d+)*, compute_80; no NVIDIA driver", reason)
    with pytest.raises(RuntimeError, match=rf"backend 'cuda' cannot run gelu: {re.escape(reason)}"):
        ops.gelu(torch.zeros(8), backend="cuda")


@built
@no_gpu
def test_a_launch_that_fails_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = (as_if_on_a_gpu(torch.zeros(70, 256), monkeypatch) for _ in range(2))
    assert x.is_cuda
    with pytest.raises(
        RuntimeError,
        match=r"cannot launch gelu_forward: grid \(3, 1, 1\), 256 threads a block, 0 bytes of shared memory: .*driver",
    ):
        _C.gelu_forward(x, None, out, True, (0, torch.empty, False))


def test_shared_memory_is_asked_for_once_per_kernel_and_device(tmp_path: Path) -> None:
    """With a CUDA runtime that counts the calls: launches that need no more than before make none."""
    (tmp_path / "cuda_runtime.h").write_text("""
        #include <cstddef>
        enum cudaError_t { cudaSuccess }; enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
        struct dim3 { dim3(unsigned = 1, unsigned = 1, unsigned = 1) {} };
        typedef void* cudaStream_t;
        struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; };
        int device, asked, launched;
        inline cudaError_t cudaGetLastError() { return cudaSuccess; }
        inline const char* cudaGetErrorString(cudaError_t) { return ""; }
        inline cudaError_t cudaGetDevice(int* d) { return *d = device, cudaSuccess; }
        inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return ++asked, cudaSuccess; }
        template <class... A>
        cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t*, A...) { return ++launched, cudaSuccess; }
    """)
    (tmp_path / "main.cpp").write_text("""
        #include "csrc/launch.h"
        #include <cstdio>
        void one(int) {}
        void other(int) {}
        void run(void (*kernel)(int), size_t bytes) {
          gptcore::launch({"", 1, 1, 1, 32, bytes, nullptr}, kernel, 1);
          std::printf("%d ", asked);
        }
        int main() {
          run(one, 48 << 10), run(one, 50000), run(one, 50000), run(one, 60000), run(one, 50000), run(other, 50000);
          device = 1;
          run(one, 60000), run(one, 60000);
          std::printf("%d", launched);
        }
    """)
    command = ["g++", "-std=c++17", f"-I{tmp_path}", "-I.", str(tmp_path / "main.cpp"), "-o", str(tmp_path / "main")]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
    assert subprocess.check_output([tmp_path / "main"], text=True) == "0 1 1 2 2 3 4 4 8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_kernels_a_tensor_on_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if _C.cuda_archs():
        pytest.skip("built with CUDA kernels")
    x, out = (as_if_on_a_gpu(torch.zeros(70, 256), monkeypatch) for _ in range(2))
    _C.gelu_forward(x, None, out, True, None)  # checks, and runs nothing
    with pytest.raises(ValueError, match="a tensor is on cuda:0, expected cpu"):
        _C.gelu_forward(x, None, out, True, (0, torch.empty, False))


def test_a_tensor_on_another_gpu_than_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))

    def on(index: int) -> torch.Tensor:
        device = torch.device("cuda", index)
        return SimpleNamespace(is_cuda=True, device=device, get_device=lambda: index)  # type: ignore[return-value]

    execution = native.execution("cuda", on(0))
    assert isinstance(execution, tuple)
    assert execution[0] == 7
    with pytest.raises(ValueError, match=r"tensors are on cuda:1, expected the current GPU, cuda:0; use .*device\(1\)"):
        native.execution("cuda", on(1))


@pytest.mark.skipif(ops.backends()["simt"] is not None, reason="the GPU simulator is not built")
@pytest.mark.parametrize(
    ("shape", "kv_shape"),
    [((1, 1 << 15, 1, 8), (1, 1 << 15, 1 << 20, 8)), ((1 << 15, 1 << 16, 1, 8), (1 << 15, 1 << 16, 1, 8))],
    ids=["blocks", "heads"],
)
def test_more_blocks_than_a_grid_has(shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> None:
    from gptcore import _simt

    one = torch.zeros(1, 1, 1, 8)
    q, k, lse = one.expand(shape), one.expand(kv_shape), torch.zeros(1, 1, 1).expand(shape[:3])
    execution = (0, lambda size: torch.empty(size, dtype=torch.uint8), False)
    with pytest.raises(ValueError, match=r"expected (at most 32767 heads in the batch at that length: a GPU starts at "
                       r"most 2\^31 - 1 blocks|batch x heads, .* at most 2\^31 - 257)"):  # fmt: skip
        _simt.attention_forward(q, k, k, q, lse, Settings(), execution)
