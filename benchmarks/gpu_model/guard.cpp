// What a CPU build of torch lacks to run autograd and Inductor on fake CUDA tensors: a device guard whose streams and
// events do nothing, and hooks that speak of one device without a context. torch looks for the hooks once, when it
// first asks whether there is CUDA, so this library is loaded before it is imported (guard.py).
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kOnly = 0;

class NoHooks final : public at::CUDAHooksInterface {
 public:
  explicit NoHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  // false: autograd then leaves the device's streams alone
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return kOnly; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return kOnly; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return kOnly; }
};

class NoGuard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return only(); }
  c10::Device exchangeDevice(c10::Device) const override { return only(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Device only() { return {c10::DeviceType::CUDA, kOnly}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, only()); }
};

at::RegistererCUDAHooksRegistry hooks(
    "CUDAHooks", at::CUDAHooksRegistry(), at::RegistererCUDAHooksRegistry::DefaultCreator<NoHooks>);
const c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new NoGuard());

}  // namespace
