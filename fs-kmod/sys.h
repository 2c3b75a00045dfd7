/* What the module uses of the kernel beyond the kernel crate's own bindings. */
#include <linux/crc32.h>
#include <linux/zstd.h>
