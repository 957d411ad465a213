"""Kinds of GPU. Their peak rates stand in `base.devices`. A new kind is a row here.

What the numbers, and the rates, were held against in November 2026; but one, no vendor's page itself could be opened:
    B200: NVIDIA's DGX B200 user guide (docs.nvidia.com/dgx/dgxb200-user-guide: of eight 1,440 GB and 14.4 TB/s of
        NVLink, a ConnectX-7 of 400 Gbit/s each); its rate, and all of A100: glennklockwood.com/garden/processors,
        which cites NVIDIA's briefs and datasheet
    H100, H100 PCIe, H200, H20, GH200, A40, L40, L40S, RTX 4090, RTX 3090, MI300X, MI325X: copies of datasheets at
        resellers, and tables of others
From memory, and not confirmed: the rates of H100 NVL, A10, A10G, L4 (one table has 125), RTX A6000 and RTX 5090,
A30's memory, A800's NVLink, GH200's link and network, and the networks of Instinct machines.
"""

from dataclasses import dataclass

PCIE_4, PCIE_5 = 32.0, 64.0  # x16, one direction, GB/s
SLOW_NETWORK = 25 / 8  # 25 Gbit/s a GPU: a guess for machines that no vendor has specified


@dataclass(frozen=True)
class Gpu:
    """A GPU and its links, each in one direction."""

    memory_gb: float  # 10^9 bytes
    link: float  # to the other GPUs of its machine, GB/s
    network: float  # to other machines, GB/s
    host: float  # to the memory of its machine, GB/s


# Datasheets say both directions of NVLink together: 600 (A100), 900 (Hopper), 1,800 GB/s (Blackwell).
# Networks are those of the vendors' machines of eight: a ConnectX-6 of 200 Gbit/s for each GPU of a DGX A100, one of
# 400 Gbit/s in a DGX H100, H200 and B200; the Instinct platforms are sold with the same.
GPUS = {
    "B200": Gpu(180, 900, 50, PCIE_5),  # DGX B200: 1,440 GB of eight
    "H200": Gpu(141, 450, 50, PCIE_5),
    "GH200": Gpu(96, 450, 50, 450),  # NVLink-C2C to the Grace CPU
    "H100": Gpu(80, 450, 50, PCIE_5),  # SXM
    "H100 NVL": Gpu(94, PCIE_5, SLOW_NETWORK, PCIE_5),  # NVLink in pairs alone, which is not counted
    "H100 PCIe": Gpu(80, PCIE_5, SLOW_NETWORK, PCIE_5),
    "H20": Gpu(96, 450, 50, PCIE_5),
    "A100": Gpu(80, 300, 25, PCIE_4),  # SXM
    "A100 40GB": Gpu(40, 300, 25, PCIE_4),
    "A800": Gpu(80, 200, 25, PCIE_4),  # NVLink of 400 GB/s
    "A40": Gpu(48, PCIE_4, SLOW_NETWORK, PCIE_4),
    "A30": Gpu(24, PCIE_4, SLOW_NETWORK, PCIE_4),
    "A10": Gpu(24, PCIE_4, SLOW_NETWORK, PCIE_4),
    "A10G": Gpu(24, PCIE_4, SLOW_NETWORK, PCIE_4),
    "L40S": Gpu(48, PCIE_4, SLOW_NETWORK, PCIE_4),
    "L40": Gpu(48, PCIE_4, SLOW_NETWORK, PCIE_4),
    "L4": Gpu(24, PCIE_4, SLOW_NETWORK, PCIE_4),
    "RTX A6000": Gpu(48, PCIE_4, SLOW_NETWORK, PCIE_4),
    "RTX 5090": Gpu(32, PCIE_5, SLOW_NETWORK, PCIE_5),
    "RTX 4090": Gpu(24, PCIE_4, SLOW_NETWORK, PCIE_4),
    "RTX 3090": Gpu(24, PCIE_4, SLOW_NETWORK, PCIE_4),
    "MI325X": Gpu(256, 448, 50, PCIE_5),  # Infinity Fabric: seven links of 128 GB/s, both directions
    "MI300X": Gpu(192, 448, 50, PCIE_5),
}
