/*
 * libfuse's low-level interface, in the version that this program is written for.
 */
#ifndef FF_FUSE_API_H
#define FF_FUSE_API_H

#define FUSE_USE_VERSION 314
#include <fuse_lowlevel.h>

#endif
