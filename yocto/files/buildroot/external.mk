include $(sort $(wildcard $(BR2_EXTERNAL_MENDER_CONNECT_RS_PATH)/package/*/*.mk))
