// The runtime: one object, which every kernel's library is linked with. Its chapters, each on those before it:
#include "integers.h"    // whole numbers and bits
#include "numbers.h"     // floating-point numbers
#include "machine.h"     // what there is
#include "roundings.h"   // numbers to fewer bits
#include "scheduler.h"   // who runs next
#include "order.h"       // what came before what
#include "memory.h"      // every access
#include "warps.h"       // what lanes do together
#include "barriers.h"    // of blocks and clusters
#include "copies.h"      // cp.async
#include "mbarriers.h"   // and proxies
#include "tensor.h"      // boxes
#include "products.h"    // of warps
#include "layouts.h"     // of matrices in shared memory
#include "warpgroups.h"  // and their products
#include "launch.h"      // what Python calls
