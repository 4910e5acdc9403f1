// The part of OpenCV that FFCV uses (cv::resize): core and imgproc, instead of every module's header.
#include "opencv2/core.hpp"
#include "opencv2/imgproc.hpp"
