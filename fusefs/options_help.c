/*
 * What -h and -V say.
 */
#include <linux/fuse.h>
#include <stdio.h>

#include "ff_store.h"
#include "fusefs/fuse_api.h"
#include "fusefs/options.h"

void options_print_help(void)
{
	puts("usage: fleecefs SOURCE MOUNTPOINT [options]\n"
	     "\n"
	     "Shows SOURCE at MOUNTPOINT, live. mkdir MOUNTPOINT/snapshots/NAME freezes all files\n"
	     "at one moment, to be read there while the live ones are written; rmdir drops it.\n"
	     "\n"
	     "Options, each also as -o name=V:\n"
	     "    --fleece-dir=DIR        where old data is kept, on fast local storage\n"
	     "                            (default: SOURCE/.fleecefs, which the mount hides)\n"
	     "    --snapdir=NAME          name of the directory of snapshots (default: snapshots)\n"
	     "    --snapshot=NAME         make this snapshot before the mount is ready, and drop\n"
	     "                            it at unmount (default: none)\n"
	     "    --cluster-size=SIZE     grain of preserving, 4K to 2M (default: 4K)\n"
	     "    --on-cbw-error=POLICY   what gives way when old data cannot be saved:\n"
	     "                            break-snapshot or break-guest-write\n"
	     "                            (default: break-snapshot)\n"
	     "    --cbw-timeout=SECONDS   longest a write waits for a save before that policy\n"
	     "                            applies (default: 0, no limit)\n"
	     "    --fleece-limit=SIZE     budget of all saved data (default: 0, none)\n"
	     "    --fleece-reserve=SIZE   keep free on the filesystem of DIR (default: 64M)\n"
	     "    --source-lock=on|off    keep QEMU from writing to files of SOURCE itself\n"
	     "                            (default: on)\n"
	     "    --exclude=GLOB          live but never frozen; repeatable (default: none)\n"
	     "    --device=GLOB           symlinks in SOURCE to such block devices are served as\n"
	     "                            files of their size; repeatable (default: none)\n"
	     "    --backing=PATTERN       name of the older image in an incremental one, of %u,\n"
	     "                            %o and %p (default: %u%o/%p)\n"
	     "    --log-level=LEVEL       what is logged: error, warning, info or debug and all\n"
	     "                            before it (default: info)\n"
	     "    --durable               snapshots survive power loss; costs a flush before\n"
	     "                            each first overwrite (default: off)\n"
	     "    -f                      stay in the foreground (default: off)\n"
	     "    -d, -o debug            print every request, implies -f (default: off)\n"
	     "    -s                      serve requests in one thread (default: off)\n"
	     "    -h, --help              this text\n"
	     "    -V, --version           versions\n"
	     "    -o max_threads=N        most threads that serve requests (default: 64)\n"
	     "    -o max_idle_threads=N   most threads kept idle (default: 16)\n"
	     "    -o clone_fd             a /dev/fuse descriptor for each thread (default: off)\n"
	     "\n"
	     "libfuse's own options (allow_other lets other users in; default: off):");
	fflush(stdout);
	fuse_lowlevel_help();
}

void options_print_version(void)
{
	printf("fleecefs %s\n", FF_VERSION);
	printf("libfuse %s\n", fuse_pkgversion());
	printf("%s\n", ff_store_libraries());
	printf("FUSE kernel protocol %d.%d\n", FUSE_KERNEL_VERSION, FUSE_KERNEL_MINOR_VERSION);
	fflush(stdout);
	fuse_lowlevel_version();
}
