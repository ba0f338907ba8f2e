#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>

/* What pthread_mutex_trylock returns for a mutex that this thread holds, and
 * pthread_mutex_unlock after it: of one without attributes, and of one with TYPE.
 * KIND is what glibc calls the former.
 */
int
mutex_try (int with_attr, int type, int *kind)
{
  pthread_mutexattr_t attr;
  pthread_mutex_t m;
  int r;

  pthread_mutexattr_init (&attr);
  if (pthread_mutexattr_settype (&attr, type) != 0)
    return -1;
  if (pthread_mutex_init (&m, with_attr ? &attr : NULL) != 0)
    return -2;
  *kind = m.__data.__kind;
  if (pthread_mutex_lock (&m) != 0)
    return -3;
  r = pthread_mutex_trylock (&m);
  if (r == 0 && pthread_mutex_unlock (&m) != 0)
    return -4;
  if (pthread_mutex_unlock (&m) != 0 || pthread_mutex_destroy (&m) != 0)
    return -5;
  return r;
}
