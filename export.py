"""Write a checkpoint for other programs: a Darknet pair, ONNX, OpenVINO, TorchScript, beside the weights.

python export.py --weights runs/train/exp/weights/best.pt --include darknet onnx openvino torchscript
python export.py --weights runs/train/exp/weights/best.pt --include onnx openvino --int8 --data data/digits.yaml
"""

from utils.errors import run_script
from utils.flags import Argv, add_cfg, add_device, add_size, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    p.add_argument("--weights", required=True, help="any checkpoint: ours, a pruned one, a YOLOv5 .pt, a Darknet .weights with its cfg")
    add_cfg(p)
    add_size(p, None, sides=2)
    p.add_argument("--batch-size", "--batch", type=int, default=1, help="images at a time, in files of fixed size")
    p.add_argument("--include", nargs="+", metavar="FORMAT", help="darknet, onnx, openvino, torchscript (default: onnx)")
    p.add_argument("--dynamic", action="store_true", help="onnx, openvino: any batch, height and width")
    p.add_argument("--nms", action="store_true", help="onnx, openvino: the file ends with final detections")
    p.add_argument("--conf-thres", "--conf", type=float, default=0.25, help="with --nms: smallest confidence")
    p.add_argument("--iou-thres", "--iou", type=float, default=0.45, help="with --nms: IoU above which a box suppresses another")
    p.add_argument("--max-det", type=int, default=1000, help="with --nms: rows per image")
    p.add_argument("--opset", type=int, default=17, help="version of ONNX's operators, 12 to 21")
    p.add_argument("--int8", action="store_true", help="onnx, openvino: quantise, with the ranges that the images of --data give")
    p.add_argument("--tensorrt", action="store_true", help="int8 without zero points, an ONNX file for TensorRT")
    p.add_argument("--data", default="", help="with --int8: dataset .yaml, or Darknet .data, whose training images calibrate")
    p.add_argument("--calibration", default="minmax", metavar="METHOD", help="with --int8: minmax, percentile or entropy")
    p.add_argument("--calibration-images", type=int, default=128, metavar="N", help="with --int8: how many images")
    p.add_argument(
        "--one-shot", action="store_true", help="with --recipe: prune and quantise as it ends, without training, and write that .pt too"
    )
    p.add_argument("--recipe", default="", help="with --one-shot: the recipe")
    p.add_argument("--recipe-args", default="", help="values for the recipe's variables: NAME=VALUE,NAME=VALUE or a JSON object")
    p.add_argument("--half", action="store_true", help="refused: files are written in float32")
    p.add_argument("--simplify", action="store_true", help="does nothing: the graph is written simple")
    add_device(p, workers=False)
    args = p.parse_args(argv)
    from engine.export_run import ExportOptions, export

    export(ExportOptions(**{**vars(args), "include": tuple(args.include or ("onnx",))}))


if __name__ == "__main__":
    run_script(main)
