"""The device that hosts are trained on in these tests: the CPU, or what GUARDRAILS_TEST_DEVICE names.

Tests of several processes stay on the CPU: two ranks cannot share a GPU.
"""

import os

DEVICE = os.environ.get("GUARDRAILS_TEST_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"
SEVERAL_PROCESSES = {"GUARDRAILS_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
