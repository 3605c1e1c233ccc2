# SPDX-License-Identifier: Apache-2.0
"""LoRC: key and value projections of low rank, chosen layer by layer; public as `uncomp.lorc`."""

from uncomp.transforms.lorc.apply import compress
from uncomp.transforms.lorc.calibrated import Calibration, calibrate
from uncomp.transforms.lorc.config import LorcConfig
from uncomp.transforms.lorc.files import attach, is_checkpoint
from uncomp.transforms.lorc.handle import LorcHandle
from uncomp.transforms.lorc.loading import load
from uncomp.transforms.lorc.schedule import Ranks, rank_schedule

__all__ = [
    "Calibration",
    "LorcConfig",
    "LorcHandle",
    "Ranks",
    "attach",
    "calibrate",
    "compress",
    "is_checkpoint",
    "load",
    "rank_schedule",
]
