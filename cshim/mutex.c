/* Mutexes of modules.
 *
 * A module that serves requests in parallel usually has a mutex that it holds for
 * a microsecond, and glibc's default mutex sleeps at once where it is held. The
 * adaptive one, which looks a few times before that and learns how often it pays,
 * differs from it in nothing else. The executable comes before libc where a module's
 * symbols are looked up, so this one is called.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>

#include "shim.h"

#ifdef PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP
PUBLIC int
pthread_mutex_init (pthread_mutex_t *mutex, const pthread_mutexattr_t *attr)
{
  int (*libc) (pthread_mutex_t *, const pthread_mutexattr_t *);

  if (attr == NULL) {
    *mutex = (pthread_mutex_t) PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP;
    return 0;
  }
  libc = dlsym (RTLD_NEXT, "pthread_mutex_init");
  return libc (mutex, attr);
}
#endif
