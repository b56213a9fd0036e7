"""Operators under NVIDIA's compute-sanitizer: reads and writes outside of allocations.

    python benchmarks/check_memory.py --out benchmarks/results/last.jsonl

Each case runs in a separate process, on awkward shapes, without PyTorch's caching allocator, in whose large
blocks a stray access would hit the next tensor undetected. Without compute-sanitizer, and on a CPU, the cases
run directly. Summaries: `memory.CASE_clean` (1: no error), and `memory.sanitizer` (1: it was used).
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch

from harness import Report, arguments
from stpp_kernels import finalize, softmax_accumulate, upsample_cross_entropy

TIMEOUT_S = 120


def cross_entropy(device: torch.device) -> None:
    """Computes loss and gradient, in both layouts, of maps that fill no tile."""
    for layout in (torch.contiguous_format, torch.channels_last):
        logits = torch.randn(2, 21, 7, 9, device=device).contiguous(memory_format=layout).requires_grad_()
        labels = torch.randint(21, (2, 27, 33), dtype=torch.uint8, device=device)
        labels[:, :3] = 255
        loss, counted = upsample_cross_entropy(logits, labels)
        (loss / counted).backward()
        assert logits.grad.isfinite().all() and loss.isfinite()


def ten_views(device: torch.device) -> None:
    """Sums and finishes views of several sizes, plain and mirrored."""
    sums = torch.zeros(2, 21, 37, 53, device=device)
    for size in ((18, 26), (37, 53), (74, 106)):
        low = torch.randn(2, 21, -(-size[0] // 4), -(-size[1] // 4), device=device)
        for mirrored in (False, True):
            softmax_accumulate(sums, low, size, (37, 53), mirrored)
    masks = finalize(sums)[0]
    assert masks.shape == (2, 37, 53) and int(masks.max()) < 21


CASES: dict[str, Callable[[torch.device], None]] = {"cross_entropy": cross_entropy,
                                                    "softmax_accumulate": ten_views}


def checked(case: str, device: torch.device, sanitizer: str | None) -> bool:
    """Runs a case in a process, prints its output, and returns whether it was free of errors."""
    command = [sys.executable, __file__, "--device", str(device), "--case", case]
    if sanitizer:
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99", *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    print(f"{case}: exit {done.returncode}\n{done.stdout}{done.stderr}", flush=True)
    told = re.search(r"ERROR SUMMARY: (\d+) error", done.stdout + done.stderr)
    if sanitizer and told is None:
        raise RuntimeError(f"{case}: {sanitizer} gave no verdict (exit {done.returncode})")
    return done.returncode == 0 and (told is None or told[1] == "0")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="run this case here, without the sanitizer")
    options = parser.parse_args()
    if options.case:
        CASES[options.case](torch.device(options.device))
        return
    report = Report(options)
    sanitizer = shutil.which("compute-sanitizer") if report.device.type == "cuda" else None
    report.summary("memory.sanitizer", float(sanitizer is not None))
    clean = {case: checked(case, report.device, sanitizer) for case in CASES}
    for case, good in clean.items():
        report.summary(f"memory.{case}_clean", float(good))
    report.finish()
    assert all(clean.values()), clean


if __name__ == "__main__":
    main()
